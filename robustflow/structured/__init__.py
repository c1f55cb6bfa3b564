"""Networks whose structure is a property: the systems of the talk beyond robustness, with data, models, figures."""
