"""What belongs to no field: one-line errors, devices, where a number came from, what a model's name means."""
