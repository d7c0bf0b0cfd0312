"""The engine directory on disk: manifest, hashes, atomic writes."""
