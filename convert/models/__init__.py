"""Model families: what each brings to a conversion, in one place that all verbs ask."""
