"""What a person sees of a run: the console, metrics.jsonl, and the trackers."""
