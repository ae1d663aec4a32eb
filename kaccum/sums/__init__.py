"""What the open window holds: sums of gradients, log numbers and moments."""
