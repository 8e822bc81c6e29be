"""What was written and what it cost: the report and the model card."""
