"""What each step changes in the shared rows: functions of a draft, each a whole step or an error."""
