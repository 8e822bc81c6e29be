"""The artifact: a Hugging Face folder whose weights are payloads. ``docs/format.md`` describes its bytes."""
