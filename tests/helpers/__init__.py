"""What tests share: paths, tiny settings, references, cases."""
