"""What a person looks at: plots, completions, the model card, progress inside a step."""
