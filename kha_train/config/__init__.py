"""The configuration: schema, composition, validation."""
