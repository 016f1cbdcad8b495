"""What every room uses: checks of single arguments, whole files, near names, tables."""
