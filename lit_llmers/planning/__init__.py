"""What a run will take: models that hold shapes and no numbers are built and rehearsed, and the rest is arithmetic."""
