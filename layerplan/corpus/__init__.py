"""Raw text to a token store, and a token store to a training order."""
