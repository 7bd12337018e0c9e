"""LightningModules for recommenders, one per task."""
