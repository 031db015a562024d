use super::*;
use proptest::prelude::*;

/// As Linux 6.12 and 7.2 wrote it of a buffer of vivid's.
const FDINFO: &str =
    "pos:\t0\nflags:\t02000002\nmnt_id:\t12\nino:\t1\nsize:\t921600\ncount:\t3\nexp_name:\tvideobuf2_vmalloc\n";

const BUFINFO: &str = "\nDma-buf Objects:\n\
size    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n\
00921600\t00000002\t00080007\t00000003\tvideobuf2_vmalloc\t00000004\t<none>\n\
\tAttached Devices:\n\
\tvkms\n\
Total 1 devices attached\n\n\
00004096\t00000002\t00080007\t00000001\tudmabuf\t00000007\tcamera\n\
\tkernel fence:vgem dmaflow seq 1 unsignalled\n\
\tAttached Devices:\n\
Total 0 devices attached\n\n\n\
Total 2 objects, 925696 bytes\n";

#[test]
fn fdinfo_of_a_dma_buf_and_of_others() {
    let found = fdinfo(FDINFO.as_bytes()).unwrap();
    assert_eq!(
        found,
        FdInfo { inode: Some(1), size: 921_600, references: Some(3), exporter: "videobuf2_vmalloc".into(), name: None }
    );
    assert_eq!(fdinfo(b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t5\n"), None);
    assert_eq!(fdinfo(b"pos:\t0\nflags:\t02\nino:\t5\nsize:\t4096\n"), None);
    assert_eq!(fdinfo(b""), None);
}

#[test]
fn a_name_cannot_pass_for_a_field() {
    let text = format!("{FDINFO}name:\tx\nsize:\t1\nexp_name:\tdrm\n");
    let found = fdinfo(text.as_bytes()).unwrap();
    assert_eq!((found.size, found.exporter.as_str()), (921_600, "videobuf2_vmalloc"));
    assert_eq!(found.name.as_deref(), Some("x\nsize:\t1\nexp_name:\tdrm"));
}

#[test]
fn mappings_of_dma_bufs_alone() {
    let text = "55d2e674f000-55d2e67b0000 r--p 00000000 00:16 9                          /usr/bin/dmaflow\n\
        7f92d5cef000-7f92d5dd0000 rw-s 00001000 00:0b 8                          /dmabuf:\n\
        7f92d5dd0000-7f92d5eb1000 rw-p 00000000 00:0b 7                          /dmabuf:a b\\012c\n\
        7ffd8a5c1000-7ffd8a5e2000 rw-p 00000000 00:00 0                          [stack]\n";
    let found = maps(text.as_bytes());
    let facts: Vec<_> = found
        .iter()
        .map(|map| (map.inode, map.end - map.start, map.offset, map.access.as_str(), map.device, map.name.as_deref()))
        .collect();
    assert_eq!(facts, [(8, 921_600, 4096, "rw-s", (0, 11), None), (7, 921_600, 0, "rw-p", (0, 11), Some("a b\\012c"))]);
}

#[test]
fn bufinfo_with_devices_and_fences() {
    let found = bufinfo(BUFINFO.as_bytes());
    assert_eq!(found.total, Some(2));
    let first = BufInfoEntry {
        inode: 4,
        size: 921_600,
        references: Some(3),
        exporter: "videobuf2_vmalloc".into(),
        name: None,
        devices: vec!["vkms".into()],
    };
    assert_eq!(found.buffers[0], first);
    assert_eq!((found.buffers[1].inode, found.buffers[1].name.as_deref()), (7, Some("camera")));
    assert!(found.buffers[1].devices.is_empty());
    let none = bufinfo(b"\nDma-buf Objects:\nsize    \tflags\n\nTotal 0 objects, 0 bytes\n");
    assert_eq!(none, BufInfo { buffers: vec![], total: Some(0) });
}

#[test]
fn a_name_cannot_pass_for_a_device_or_a_buffer() {
    let hostile = "\n\tAttached Devices:\n\tevil\n";
    let found = bufinfo(BUFINFO.replace("camera", hostile).as_bytes());
    assert_eq!(found.buffers.len(), 2);
    assert!(found.buffers[1].devices.is_empty());
    assert_eq!(found.buffers[1].name.as_deref(), Some("\n\tAttached Devices:\n\tevil\n"));
    let hostile = "\nTotal 9 objects, 1 bytes";
    assert_eq!(bufinfo(BUFINFO.replace("camera", hostile).as_bytes()).total, Some(2));
    let tabs = bufinfo(BUFINFO.replace("camera", "a\t00000009\tb").as_bytes());
    assert_eq!(tabs.buffers[1].name.as_deref(), Some("a\t00000009\tb"));
    assert_eq!(tabs.buffers[1].inode, 7);
}

#[test]
fn names_of_processes() {
    let line = b"165 (a) b\\n\\\\c) S 164 0 0 0 -1 4194560 158 0 5 0 27 16 0 0 20 0 1 0 637 5537792 883\n";
    let found = stat(line).unwrap();
    assert_eq!(found, Stat { name: "a) b\n\\c".into(), is_kernel: false, start: 637 });
    let kernel = b"2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 2 0 0 20 0 1 0 52 0 0\n";
    assert!(stat(kernel).unwrap().is_kernel);
    assert_eq!(stat(b"165 (x) S 1"), None);
    assert_eq!(stat(b")165 ("), None);
}

/// What a program can call its buffer: 31 bytes without a zero.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::sample::select(vec![
        "\n",
        "\t",
        "Total 1 devices attached",
        "\tAttached Devices:\n",
        "\t00000009\t",
        "00004096\t00000002\t00080007",
        "name:\t",
        "size:\t1\n",
        " fence:",
        "<none>",
        "\u{202e}",
    ]);
    let piece = prop_oneof![words.prop_map(|word| word.as_bytes().to_vec()), prop::collection::vec(1_u8.., 1..8)];
    prop::collection::vec(piece, 0..5).prop_map(|pieces| {
        let mut name = pieces.concat();
        name.truncate(31);
        name
    })
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..100_u64, any::<u64>(), Just(u64::MAX), u64::from(u32::MAX) - 1..u64::from(u32::MAX) + 2]
}

proptest! {
    #[test]
    fn any_bytes_do(text in prop::collection::vec(any::<u8>(), 0..300)) {
        fdinfo(&text);
        maps(&text);
        bufinfo(&text);
        stat(&text);
    }

    #[test]
    fn lines_torn_anywhere_do(cut in 0_usize..500, byte in any::<u8>(), at in 0_usize..500) {
        for text in [FDINFO, BUFINFO, "7f92d5cef000-7f92d5dd0000 rw-s 00001000 00:0b 8   /dmabuf:x\n", "1 (a) S 1 2 3 4 5 6"] {
            let mut text = text.as_bytes().to_vec();
            let place = at % text.len();
            text[place] = byte;
            text.truncate(cut);
            fdinfo(&text);
            maps(&text);
            bufinfo(&text);
            stat(&text);
        }
    }

    #[test]
    fn fdinfo_whatever_the_name(name in name(), inode in number(), size in number(), references in number()) {
        let fields = format!("ino:\t{inode}\nsize:\t{size}\ncount:\t{references}\nexp_name:\tsystem\nname:\t");
        let mut text = fields.into_bytes();
        text.extend(&name);
        text.push(b'\n');
        let found = fdinfo(&text).unwrap();
        prop_assert_eq!((found.inode, found.size, found.references), (Some(inode), size, Some(references)));
        prop_assert_eq!(found.exporter, "system");
        prop_assert_eq!(found.name.unwrap(), String::from_utf8_lossy(&name));
    }

    #[test]
    fn bufinfo_whatever_the_names(
        buffers in prop::collection::vec((name(), number(), number(), prop::collection::vec("[a-z][a-z0-9:.]{0,9}", 0..3)), 0..5)
    ) {
        let mut text = b"\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n".to_vec();
        for (name, inode, size, devices) in &buffers {
            text.extend(format!("{size:08}\t00000002\t00080007\t00000001\tudmabuf\t{inode:08}\t").into_bytes());
            text.extend(name);
            text.extend(b"\n\tAttached Devices:\n");
            devices.iter().for_each(|device| text.extend(format!("\t{device}\n").into_bytes()));
            text.extend(format!("Total {} devices attached\n\n", devices.len()).into_bytes());
        }
        text.extend(format!("\nTotal {} objects, 0 bytes\n", buffers.len()).into_bytes());
        let found = bufinfo(&text);
        prop_assert_eq!(found.total, Some(buffers.len() as u64));
        let facts: Vec<_> = found.buffers.iter().map(|entry| (entry.inode, entry.size, entry.devices.clone())).collect();
        let expected: Vec<_> = buffers.iter().map(|(_, inode, size, devices)| (*inode, *size, devices.clone())).collect();
        prop_assert_eq!(facts, expected);
    }
}
