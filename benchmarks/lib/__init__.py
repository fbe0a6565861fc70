"""What the cases in benchmarks/ share: whole steps, peers, the files of results and their figures."""
