from launch.lab.markdown import Region
REGION = Region("<!-- results: written by launch.lab.equivalence training -->","<!-- end of the results -->","Whole trainings beside the reference")
def write(settings, jobs, page, command):
  pass
