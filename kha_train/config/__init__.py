"""The configuration: schema, registry of variants, composition, validation."""
