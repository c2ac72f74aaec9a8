"""A catalogue made searchable: embedded into a LanceDB table, and asked by words, photo or region."""
