"""What notebooks show, and how they are run."""
