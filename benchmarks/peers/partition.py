"""DuckDB sorts a log by user and writes one folder a bucket: `partition.py LOG OUT BUCKETS`."""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb


def main(log: str, out: str, buckets: int, *, memory: str = "2GB") -> None:
    """External sort under a memory limit, then COPY ... PARTITION_BY."""
    connection = duckdb.connect()
    scratch = Path(out).with_name("duckdb-scratch")
    connection.execute(f"SET threads = 2; SET memory_limit = '{memory}'; SET temp_directory = '{scratch}'")
    connection.execute(
        f"""COPY (
            SELECT *, hash(user_id) % {buckets} AS bucket FROM read_parquet('{log}/*.parquet')
            ORDER BY bucket, user_id, timestamp, item_id
        ) TO '{out}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 16384, PARTITION_BY bucket)"""
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
