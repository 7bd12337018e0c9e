"""From what is asked, a recipe and its overrides, to typed stages that fit together."""
