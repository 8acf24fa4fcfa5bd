"""Parts of the variants that stand on their own."""
