"""From records to tables and pictures. Reads files only, and never imports torch."""
