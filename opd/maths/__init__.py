"""The mathematics of the losses: functions of tensors that know no method and no run."""
