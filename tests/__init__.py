"""Architecture rules, units that mirror the package, journeys, and tiny models for them."""
