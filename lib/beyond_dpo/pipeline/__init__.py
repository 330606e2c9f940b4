"""From settings to results: configuration, data, stages, and the experiments of each paper."""
