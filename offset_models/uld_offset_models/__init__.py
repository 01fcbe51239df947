"""Middle floor of uld-sdk: the small models, trained and run locally."""
