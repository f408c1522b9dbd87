"""What was measured, for people: the page, its Markdown twin, the model card, the hub."""
