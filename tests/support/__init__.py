"""What tests of several rooms share; also imported by benchmarks and tools, which tests then import, never back."""
