"""What a hybrid is and where its weights come from: families, mixers, cache, conversion, loading, published shapes."""
