-- Gives a host a number of its own.
-- KEYS: the hash of all hosts' numbers. ARGV: the host; the number that it has had ('0': none).
-- Returns its number: the one that is written, else the one that it has had, if it is free, else the smallest free one.
local have = redis.call('HGET', KEYS[1], ARGV[1])
if have then return have end
local all, taken = redis.call('HGETALL', KEYS[1]), {}
for i = 2, #all, 2 do taken[all[i]] = true end
local number = ARGV[2]
if number == '0' or taken[number] then
    local free = 1
    while taken[string.format('%d', free)] do free = free + 1 end
    number = string.format('%d', free)
end
redis.call('HSET', KEYS[1], ARGV[1], number)
return number
