-- Puts COUNT tags one after the other, then the same tags with the other manifest, so that every request changes a tag.
-- Arguments: media type, tag prefix, COUNT, the files of the two manifests, then the repositories. Each tag is put to the
-- repository that follows that of the tag before.
local number, bodies, repositories = 0, {}, {}
local media_type, prefix, count

local function content(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

function init(args)
  media_type, prefix, count = args[1], args[2], tonumber(args[3])
  bodies = { content(args[4]), content(args[5]) }
  for place = 6, #args do
    repositories[#repositories + 1] = args[place]
  end
end

function request()
  local tag, turn = number % count, math.floor(number / count) % 2
  local repository = repositories[tag % #repositories + 1]
  number = number + 1
  local path = "/v2/" .. repository .. "/manifests/" .. prefix .. tag
  return wrk.format("PUT", path, { ["Content-Type"] = media_type }, bodies[turn + 1])
end
