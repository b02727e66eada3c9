"""Video-Bench: sample the benchmark, answer it on both sides, compare the accuracies."""
