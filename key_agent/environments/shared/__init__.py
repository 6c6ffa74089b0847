"""The rows that all environments have, signed: what is in them, who may write them, and how new they are."""
