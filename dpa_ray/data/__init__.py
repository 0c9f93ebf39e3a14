"""Sources -> prepared Parquet shards -> batches."""
