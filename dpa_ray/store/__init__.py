"""Where everything is kept: files on a local disk or in S3 (`fs`), and artifacts made of them (`artifacts`)."""

from dpa_ray.store.fs import Store, open_uri
from dpa_ray.store.messages import told
from dpa_ray.store.s3_client import configure_endpoint

__all__ = ["Store", "configure_endpoint", "open_uri", "told"]
