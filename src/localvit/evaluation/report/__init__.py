"""The report on an evaluation: results.json for programs, per_class.csv for spreadsheets, report.html for people."""
