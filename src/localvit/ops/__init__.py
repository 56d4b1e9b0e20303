"""How the locality module's layers run: one result, several speeds."""
