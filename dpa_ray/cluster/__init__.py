"""What runs beside a run on a cluster's machines: giving a node up in time, and submitting a job. Light: no torch."""
