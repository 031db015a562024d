//! What the kernel writes of dma-bufs, taken apart. Pure functions over bytes: any bytes are allowed, for a buffer's name
//! and a process's are whatever a program chose (up to 31 and 15 bytes, line ends and tabs included).

/// What `/proc/PID/fdinfo/FD` says of a dma-buf (`dma_buf_show_fdinfo`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct FdInfo {
    /// The kernel writes it since Linux 5.14.
    pub(super) inode: Option<u64>,
    pub(super) size: u64,
    pub(super) references: Option<u64>,
    pub(super) exporter: String,
    pub(super) name: Option<String>,
}

/// Takes an `fdinfo` apart; `None` if it is not that of a dma-buf.
pub(super) fn fdinfo(text: &[u8]) -> Option<FdInfo> {
    let (mut inode, mut size, mut references, mut exporter, mut name) = (None, None, None, None, None);
    let mut rest = text;
    while !rest.is_empty() {
        let (line, after) = first_line(rest);
        if let Some(value) = line.strip_prefix(b"name:\t").filter(|_| exporter.is_some()) {
            // Written last and as it is: all that follows is of the name, also what looks like another field.
            let tail = &rest[line.len() - value.len()..];
            name = Some(text_of(tail.strip_suffix(b"\n").unwrap_or(tail)));
            break;
        }
        // The first of each counts: the kernel's own fields come before the name.
        if let Some((key, value)) = split_at_byte(line, b':') {
            let value = value.strip_prefix(b"\t").unwrap_or(value);
            match key {
                b"ino" => inode = inode.or_else(|| decimal(value)),
                b"size" => size = size.or_else(|| decimal(value)),
                b"count" => references = references.or_else(|| decimal(value)),
                b"exp_name" => exporter = exporter.or_else(|| Some(text_of(value))),
                _ => {}
            }
        }
        rest = after;
    }
    Some(FdInfo { inode, size: size?, references, exporter: exporter?, name })
}

/// A mapping of a dma-buf in `/proc/PID/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MapLine {
    pub(super) start: u64,
    pub(super) end: u64,
    /// `rw-s`: read, write, execute, and shared or private.
    pub(super) access: String,
    pub(super) offset: u64,
    /// Major and minor number of the file system's device.
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
    /// With line ends as `\012`, which a name can hold as well.
    pub(super) name: Option<String>,
}

/// The mappings in a `maps` that are called as those of dma-bufs are. A file of any file system can be called so, too: the
/// device tells.
pub(super) fn maps(text: &[u8]) -> Vec<MapLine> {
    // The kernel escapes line ends in names here, so a line is a line.
    text.split(|byte| *byte == b'\n').filter_map(map_line).collect()
}

/// `start-end access offset major:minor inode   path`
fn map_line(line: &[u8]) -> Option<MapLine> {
    let (range, rest) = split_at_byte(line, b' ')?;
    let (access, rest) = split_at_byte(rest, b' ')?;
    let (offset, rest) = split_at_byte(rest, b' ')?;
    let (device, rest) = split_at_byte(rest, b' ')?;
    let (inode, path) = split_at_byte(rest, b' ')?;
    let name = path.trim_ascii_start().strip_prefix(DMA_BUF_PATH)?;
    let (start, end) = split_at_byte(range, b'-')?;
    let (major, minor) = split_at_byte(device, b':')?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let line = MapLine {
        start,
        end,
        access: text_of(access),
        offset: hexadecimal(offset)?,
        device: (u32::try_from(hexadecimal(major)?).ok()?, u32::try_from(hexadecimal(minor)?).ok()?),
        inode: decimal(inode)?,
        name: (!name.is_empty()).then(|| text_of(name)),
    };
    (start < end).then_some(line)
}

/// How the path of every dma-buf begins, in `maps` and in the links of `/proc/PID/fd`; its name follows (`dmabuffs_dname`).
pub(super) const DMA_BUF_PATH: &[u8] = b"/dmabuf:";

/// What `/sys/kernel/debug/dma_buf/bufinfo` says (`dma_buf_debug_show`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct BufInfo {
    pub(super) buffers: Vec<BufInfoEntry>,
    /// How many it says that there are.
    pub(super) total: Option<u64>,
}

/// One buffer of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct BufInfoEntry {
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) references: Option<u64>,
    pub(super) exporter: String,
    pub(super) name: Option<String>,
    pub(super) devices: Vec<String>,
}

/// Takes a `bufinfo` apart.
///
/// A buffer's name is written as it is, and can hold line ends. It cannot pass for another buffer: the shortest row has 46
/// bytes, the longest name 31. It could pass for an attached device or for the end of the list of them, so the last such
/// heading of a buffer counts, which is the kernel's.
pub(super) fn bufinfo(text: &[u8]) -> BufInfo {
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let rows: Vec<_> = lines
        .iter()
        .enumerate()
        .filter_map(|(index, line)| Some((index, row(line)?)))
        .collect();
    let ends = rows.iter().skip(1).map(|(index, _)| *index).chain([lines.len()]);
    let ends: Vec<_> = ends.collect();
    let buffers = rows.into_iter().zip(ends).map(|((index, mut entry), end)| {
        complete(&mut entry, lines.get(index + 1..end).unwrap_or_default());
        entry
    });
    let buffers = buffers.collect();
    let total = lines.iter().rev().find_map(|line| {
        let (count, _) = split_at_byte(line.strip_prefix(b"Total ")?, b' ')?;
        line.ends_with(b" bytes").then(|| decimal(count))?
    });
    BufInfo { buffers, total }
}

/// `size flags mode count exp_name ino name`, separated by tabs: size, count and inode in at least eight decimal digits,
/// flags and mode in at least eight hexadecimal ones.
fn row(line: &[u8]) -> Option<BufInfoEntry> {
    let eight = |field: &[u8]| (field.len() >= 8).then(|| decimal(field))?;
    let (size, rest) = split_at_byte(line, b'\t')?;
    let (flags, rest) = split_at_byte(rest, b'\t')?;
    let (mode, rest) = split_at_byte(rest, b'\t')?;
    let (references, rest) = split_at_byte(rest, b'\t')?;
    let size = eight(size)?;
    if [flags, mode]
        .iter()
        .any(|field| field.len() < 8 || hexadecimal(field).is_none())
        || references.len() < 8
    {
        return None;
    }
    // An exporter's name with a tab in it ends where an inode follows.
    let tabs = rest.iter().enumerate().filter(|(_, byte)| **byte == b'\t');
    let found = tabs
        .filter_map(|(tab, _)| {
            let (inode, name) = split_at_byte(rest.get(tab + 1..)?, b'\t')?;
            Some((text_of(&rest[..tab]), eight(inode)?, name))
        })
        .next();
    let (exporter, inode, name) = found?;
    let name = Some(text_of(name));
    Some(BufInfoEntry { inode, size, references: decimal(references), exporter, name, devices: Vec::new() })
}

/// The lines after a buffer's row: the rest of its name, its fences, its devices.
fn complete(entry: &mut BufInfoEntry, lines: &[&[u8]]) {
    let heading = lines.iter().rposition(|line| *line == b"\tAttached Devices:");
    let before = &lines[..heading.unwrap_or(0)];
    // `\tkernel fence:driver timeline seq 1 unsignalled`
    let is_fence = |line: &&[u8]| line.starts_with(b"\t") && line.windows(7).any(|part| part == b" fence:");
    for line in before.iter().take_while(|line| !is_fence(line)) {
        if let Some(name) = &mut entry.name {
            name.push('\n');
            name.push_str(&text_of(line));
        }
    }
    // What the kernel writes for a buffer without a name.
    entry.name = entry.name.take().filter(|name| name != "<none>");
    let after = heading.and_then(|heading| lines.get(heading + 1..)).unwrap_or_default();
    let devices = after.iter().map_while(|line| line.strip_prefix(b"\t"));
    entry.devices = devices.map(text_of).collect();
}

/// What is needed of `/proc/PID/stat`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stat {
    pub(super) name: String,
    /// A thread of the kernel has no descriptors and no mappings.
    pub(super) is_kernel: bool,
    /// In clock ticks after the machine's start: with the number it tells a process from a later one.
    pub(super) start: u64,
}

/// Takes a `stat` apart: `pid (name) state ppid … flags … starttime …`.
pub(super) fn stat(text: &[u8]) -> Option<Stat> {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    let open = text.iter().position(|byte| *byte == b'(')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let name = text.get(open + 1..close)?;
    let fields: Vec<_> = text[close + 1..]
        .split(u8::is_ascii_whitespace)
        .filter(|field| !field.is_empty())
        .collect();
    // The ninth and the 22nd; two are before the closing parenthesis.
    let flags = decimal(fields.get(9 - 3)?)?;
    let start = decimal(fields.get(22 - 3)?)?;
    Some(Stat { name: unescape(name), is_kernel: flags & KERNEL_THREAD != 0, start })
}

/// `stat` writes a line end as `\n` and a backslash twice.
fn unescape(name: &[u8]) -> String {
    let mut plain = Vec::with_capacity(name.len());
    let mut bytes = name.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => plain.push(match bytes.next() {
                Some(b'n') => b'\n',
                other => other.unwrap_or(b'\\'),
            }),
            _ => plain.push(byte),
        }
    }
    text_of(&plain)
}

fn first_line(text: &[u8]) -> (&[u8], &[u8]) {
    split_at_byte(text, b'\n').unwrap_or((text, b""))
}

fn split_at_byte(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let place = text.iter().position(|byte| *byte == at)?;
    Some((&text[..place], &text[place + 1..]))
}

/// Digits alone: no sign, no blanks.
fn decimal(field: &[u8]) -> Option<u64> {
    let digits = field.iter().all(u8::is_ascii_digit);
    digits.then(|| str::from_utf8(field).ok()?.parse().ok())?
}

fn hexadecimal(field: &[u8]) -> Option<u64> {
    let digits = field.iter().all(u8::is_ascii_hexdigit);
    digits.then(|| u64::from_str_radix(str::from_utf8(field).ok()?, 16).ok())?
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests;
