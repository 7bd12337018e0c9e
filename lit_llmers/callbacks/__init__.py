"""Thin Lightning callbacks: those that attach loss terms to a student, and those that make training resumable."""
