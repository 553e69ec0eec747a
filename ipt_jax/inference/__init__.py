"""A trained model that scores and generates."""
