-- Reads an app's hash whatever somebody may have put there.
-- KEYS: the app's hash. ARGV: most bytes of a record, most bytes of a spec.
-- Returns {rev, srev, record, spec} ('' for what is not there), or {reason} when it cannot be a hash of ours.
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return { '', '', '', '' } end
if kind ~= 'hash' then return { 'it is a ' .. kind .. ', not a hash' } end
local limits = { record = tonumber(ARGV[1]), spec = tonumber(ARGV[2]), rev = 20, srev = 20 }
for field, most in pairs(limits) do
    local length = redis.call('HSTRLEN', KEYS[1], field)
    if length > most then return { 'its field "' .. field .. '" has ' .. length .. ' bytes; ' .. most .. ' are allowed' } end
end
local have = redis.call('HMGET', KEYS[1], 'rev', 'srev', 'record', 'spec')
for i = 1, 4 do have[i] = have[i] or '' end
return have
