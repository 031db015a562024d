use super::*;
use proptest::prelude::*;

fn shapes() -> impl Strategy<Value = Shape> {
    let formats: Vec<Format> = Format::all().collect();
    let sizes = (1u32..5000, 1u32..5000, 1u32..300);
    let colours = (0usize..3, any::<bool>());
    let times =
        any::<[u64; 3]>().prop_map(|[lease_us, rate_micro, watchdog_us]| Timing { lease_us, rate_micro, watchdog_us });
    let numbers = (any::<u32>(), 1..=MAX_SLOTS, times, prop::option::of(0u64..1 << 60), 0u64..5000);
    (prop::sample::select(formats), sizes, colours, numbers).prop_filter_map(
        "a layout",
        |(format, (width, height, align), (encoding, full), (generation, buffers, timing, modifier, more))| {
            let layout = Layout::packed(format, (width, height), align).ok()?;
            let encoding = [Encoding::Bt601, Encoding::Bt709, Encoding::Bt2020][encoding];
            let colour = Colour { encoding, range: if full { Range::Full } else { Range::Limited } };
            let layout = layout.with_colour(colour).with_modifier(modifier.and_then(Modifier::from_drm));
            let lens = (0..layout.memory_planes() as u32).map(|memory| layout.memory_len(memory) as u64 + more);
            Some(Shape { generation, buffers, timing, layout, lens: lens.collect() })
        },
    )
}

/// As they are sent: without control characters.
fn texts() -> impl Strategy<Value = String> {
    "\\P{Cc}{0,60}"
}

fn messages() -> impl Strategy<Value = Message> {
    let reasons = vec![Reason::Ended, Reason::Failed, Reason::Refused, Reason::Broken, Reason::Full];
    prop_oneof![
        (any::<bool>(), texts()).prop_map(|(writable, name)| Message::Hello { writable, name }),
        (any::<u32>(), any::<bool>(), texts()).prop_map(|(budget, fences, source)| Message::Welcome(Welcome {
            budget,
            fences,
            source
        })),
        shapes().prop_map(Message::Format),
        (any::<u32>(), 0..MAX_SLOTS, any::<u64>()).prop_map(|(generation, index, identity)| Message::Buffer {
            generation,
            index,
            identity
        }),
        (prop::sample::select(reasons), texts()).prop_map(|(reason, text)| Message::End { reason, text }),
        (1..=u64::MAX).prop_map(|position| Message::Fence { position }),
    ]
}

#[test]
fn bytes_as_documented() {
    let buffer = Message::Buffer { generation: 2, index: 3, identity: 0x0102_0304_0506_0708 };
    assert_eq!(buffer.encode(), b"dmaf\x01\0\x04\0\x02\0\0\0\x03\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
    let hello = Message::Hello { writable: true, name: "me".into() };
    assert_eq!(hello.encode(), b"dmaf\x01\0\x01\0\x01\0\0\0\x02\0me");
    let fence = Message::Fence { position: 0x0102 };
    assert_eq!(fence.encode(), b"dmaf\x01\0\x06\0\x02\x01\0\0\0\0\0\0");
    let layout = Layout::contiguous(Format::parse("XR24").unwrap().0, (64, 48), 256).unwrap();
    let timing = Timing { lease_us: 50_000, rate_micro: 60_000_000, watchdog_us: 2_000_000 };
    let shape = Message::Format(Shape { generation: 1, buffers: 4, timing, layout, lens: vec![12288] });
    let expected = [
        &b"dmaf\x01\0\x03\0\x01\0\0\0\x04\0\0\0\x50\xc3\0\0\0\0\0\0\0\x87\x93\x03\0\0\0\0\x80\x84\x1e\0\0\0\0\0"[..],
        &b"XR24XR24\x40\0\0\0\x30\0\0\0\xff\xff\xff\xff\xff\xff\xff\0\0\0\x01\x01"[..],
        b"\0\0\0\0\0\0\0\0\0\x01\0\0\0\x30\0\0\0\0\0\0",
    ];
    assert_eq!(shape.encode(), expected.concat());
}

/// Whoever speaks the protocol from the documentation alone speaks this version.
#[test]
fn the_documented_version_is_the_spoken_one() {
    let lines = include_str!("../wire.rs").lines();
    let mut documented = lines.filter_map(|line| line.strip_prefix("//!  4  2  version, "));
    assert_eq!((documented.next(), documented.next()), (Some(VERSION.to_string().as_str()), None));
    let consumer = include_str!("../../../examples/consume.c");
    assert!(consumer.contains(&format!("\"dmaf\\{VERSION}\\0")), "the C program says another");
}

#[test]
fn an_end_is_understood_in_every_version_and_nothing_else_is() {
    let end = Message::End { reason: Reason::Refused, text: "version 2 is spoken here".into() };
    let of_version = |message: &Message, version: u8| {
        let mut bytes = message.encode();
        bytes[4] = version;
        Message::decode(&bytes)
    };
    assert_eq!(of_version(&end, 2), Ok(end));
    let hello = Message::Hello { writable: false, name: "me".into() };
    assert_eq!(of_version(&hello, 2), Err(Malformed::Version(2)));
}

#[test]
fn long_texts_are_cut_between_characters() {
    let text = "é".repeat(200) + "\0";
    let Ok(Message::End { text: cut, .. }) = Message::decode(&Message::End { reason: Reason::Failed, text }.encode())
    else {
        unreachable!()
    };
    assert_eq!(cut, "é".repeat(128));
}

/// What a terminal would obey is neither sent nor taken as it is.
#[test]
fn control_characters_of_texts_are_replaced() {
    let text = "\x1b[2J\u{9b}31m\r\n\t\x7f grün".to_owned();
    let shown = "?[2J?31m???? grün";
    let end = Message::End { reason: Reason::Failed, text: text.clone() }.encode();
    assert_eq!(Message::decode(&end), Ok(Message::End { reason: Reason::Failed, text: shown.into() }));
    assert!(end.ends_with(shown.as_bytes()), "it is sent so");
    // Of a server that sends it as it is.
    let mut raw = end[..10].to_vec();
    raw.extend((text.len() as u16).to_le_bytes());
    raw.extend(text.bytes());
    assert_eq!(Message::decode(&raw), Ok(Message::End { reason: Reason::Failed, text: shown.into() }));
    // A zero byte is no text.
    raw.pop();
    raw.push(0);
    assert_eq!(Message::decode(&raw), Err(Malformed::Value("text")));
}

proptest! {
    /// Whatever a peer sends as a text: nothing that a terminal obeys is left of it, and its length is what it says.
    #[test]
    fn any_text_is_sent_and_taken_without_control_characters(text in any::<String>(), raw in prop::collection::vec(any::<u8>(), 0..256)) {
        let hello = Message::Hello { writable: false, name: text.clone() }.encode();
        let Ok(Message::Hello { name, .. }) = Message::decode(&hello) else { unreachable!("{hello:?}") };
        prop_assert!(!name.chars().any(char::is_control) && name.len() <= MAX_TEXT);
        prop_assert!(without_controls(&text).collect::<String>().starts_with(&name));
        let packet = [&hello[..12], &(raw.len() as u16).to_le_bytes()[..], &raw[..]].concat();
        match Message::decode(&packet) {
            Ok(Message::Hello { name, .. }) => prop_assert!(!name.chars().any(char::is_control)),
            other => prop_assert_eq!(other, Err(Malformed::Value("text"))),
        }
    }

    #[test]
    fn what_is_encoded_is_decoded(message in messages()) {
        let bytes = message.encode();
        prop_assert!(bytes.len() <= MAX_MESSAGE);
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    /// A byte more or less is noticed, and nothing that is changed brings it down.
    #[test]
    fn what_is_changed_is_refused_or_another_message(message in messages(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = message.encode();
        prop_assert_eq!(Message::decode(&bytes[..at.index(bytes.len())]), Err(Malformed::Short));
        bytes.push(0);
        prop_assert!(Message::decode(&bytes).is_err());
        bytes.pop();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(other) = Message::decode(&bytes) {
            prop_assert_eq!(Message::decode(&other.encode()), Ok(other));
        }
    }

    #[test]
    fn anything(bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0u16..8) {
        let _ = Message::decode(&bytes);
        let head = [&MAGIC[..], &VERSION.to_le_bytes(), &kind.to_le_bytes(), &bytes].concat();
        let _ = Message::decode(&head);
    }
}
