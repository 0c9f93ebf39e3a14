"""What would a recipe cost on so many GPUs, and what would be the limit? `jobs/doctor.py --plan`."""
