"""Generation: prompt encoding, key/value caches, guided flow, decoding."""
