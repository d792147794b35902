// SPDX-License-Identifier: Apache-2.0
// Time runs `speed` times as fast: every window and every `for` of the rules, and nothing else. None is shorter than 30 s,
// since what is below is not faster: scrapes every 2 s, and the kernel's list of queue pairs every 10 s. There is no Cilium
// on the stage.
function(speed)
  local faster(time) =
    local number = std.parseInt(std.substr(time, 0, std.length(time) - 1));
    local unit = { s: 1, m: 60, h: 3600 }[std.substr(time, std.length(time) - 1, 1)];
    '%ds' % std.max(30, std.ceil(number * unit / speed));
  local walk(config) = std.mapWithKey(
    function(key, value)
      if std.isObject(value) then walk(value)
      else if key == 'for' || std.endsWith(std.asciiLower(key), 'window') then faster(value)
      else value,
    config,
  );
  { _config:: walk(super._config) { cilium: false } }
