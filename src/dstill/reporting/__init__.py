"""What people look at: figures and pages made from the records of runs."""
