"""`internlm3 serve --replicas`: the server's app on the machines of a Ray cluster, as deployments of Ray Serve."""
