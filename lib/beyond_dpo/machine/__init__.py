"""Processes and files of one machine."""
