"""What fine-tuning an adapter means for each family of base models."""
