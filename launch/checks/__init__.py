"""Problems that can be found before a model loads."""
