//! Tokens: what is valid, and each way not to be.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "tests"
)]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use leeward_identity::jwt::{KeySet, Rejected, Wanted, fingerprint, verify};
use serde_json::{Value, json};

const NOW: u64 = 1_800_000_000;

fn text(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Something that signs.
enum Signer {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl Signer {
    fn rsa(size: KeySize) -> Self {
        Self::Rsa(RsaKeyPair::generate(size).unwrap())
    }

    fn p256() -> Self {
        Self::P256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    fn ed() -> Self {
        Self::Ed(Ed25519KeyPair::generate().unwrap())
    }

    fn alg(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed(_) => "EdDSA",
        }
    }

    fn jwk(&self, kid: &str) -> Value {
        match self {
            Self::Rsa(pair) => {
                let public = pair.public_key();
                let (n, e) = (public.modulus(), public.exponent());
                json!({"kty": "RSA", "kid": kid, "use": "sig",
                    "n": text(n.big_endian_without_leading_zero()),
                    "e": text(e.big_endian_without_leading_zero())})
            }
            Self::P256(pair) => {
                let point = pair.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "kid": kid, "x": text(&point[1..33]), "y": text(&point[33..])})
            }
            Self::Ed(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "alg": "EdDSA", "x": text(pair.public_key())})
            }
        }
    }

    fn token(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", text(header.to_string()), text(claims.to_string()));
        let random = SystemRandom::new();
        let signature = match self {
            Self::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message.as_bytes(), &mut signature)
                    .unwrap();
                signature
            }
            Self::P256(pair) => pair.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Ed(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
        };
        format!("{message}.{}", text(signature))
    }

    fn good(&self, kid: &str) -> String {
        self.token(&json!({"alg": self.alg(), "kid": kid}), &claims())
    }
}

fn claims() -> Value {
    json!({"iss": "https://issuer.example", "aud": ["other", "shop"], "exp": NOW + 300, "nbf": NOW - 10, "sub": "ada"})
}

fn with(field: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[field] = value;
    claims
}

fn keys(of: &[Value]) -> KeySet {
    KeySet::parse(json!({"keys": of}).to_string().as_bytes()).unwrap()
}

fn check(token: &str, keys: &KeySet) -> Result<String, Rejected> {
    let audiences = ["shop".into()];
    let wanted = Wanted {
        issuer: "https://issuer.example",
        audiences: &audiences,
    };
    verify(token, keys, &wanted, NOW).map(|valid| valid.claims["sub"].as_str().unwrap().to_owned())
}

#[test]
fn a_token_of_each_algorithm_is_valid_by_its_own_key_only() {
    let signers = [Signer::rsa(KeySize::Rsa2048), Signer::p256(), Signer::ed()];
    let all = keys(
        &signers
            .iter()
            .zip(["0", "1", "2"])
            .map(|(s, kid)| s.jwk(kid))
            .collect::<Vec<_>>(),
    );
    for (i, signer) in signers.iter().enumerate() {
        let kid = i.to_string();
        assert_eq!(
            check(&signer.good(&kid), &all),
            Ok("ada".to_owned()),
            "{}",
            signer.alg()
        );
        let without = signer.token(&json!({"alg": signer.alg()}), &claims());
        assert_eq!(
            check(&without, &all),
            Ok("ada".to_owned()),
            "without a kid every key is tried"
        );
        let another = ((i + 1) % 3).to_string();
        assert_eq!(check(&signer.good(&another), &all), Err(Rejected::Signature));
        assert_eq!(check(&signer.good("9"), &all), Err(Rejected::UnknownKey));
        let mut tampered = signer.good(&kid);
        let claims = tampered.find('.').unwrap() + 5;
        let swapped = if tampered.as_bytes()[claims] == b'A' {
            "B"
        } else {
            "A"
        };
        tampered.replace_range(claims..=claims, swapped);
        assert!(check(&tampered, &all).is_err());
    }
    let stranger = Signer::ed();
    assert_eq!(check(&stranger.good("2"), &all), Err(Rejected::Signature));
}

#[test]
fn none_and_shared_secrets_are_no_signatures() {
    let signer = Signer::rsa(KeySize::Rsa2048);
    let set = keys(&[signer.jwk("k")]);
    for alg in [
        "none", "None", "HS256", "HS384", "HS512", "RS384", "PS256", "ES384", "",
    ] {
        let token = signer.token(&json!({"alg": alg, "kid": "k"}), &claims());
        assert_eq!(check(&token, &set), Err(Rejected::Algorithm), "{alg}");
    }
    // The public key as a secret is what confused implementations take (RFC 8725 §2.1); here no secret is ever one.
    let (head, _) = signer
        .good("k")
        .rsplit_once('.')
        .map(|(h, s)| (h.to_owned(), s.to_owned()))
        .unwrap();
    assert_eq!(check(&format!("{head}."), &set), Err(Rejected::Signature));
    let other = signer.token(&json!({"alg": "EdDSA", "kid": "k"}), &claims());
    assert_eq!(
        check(&other, &set),
        Err(Rejected::Signature),
        "the key says which algorithm it is"
    );
    let critical = signer.token(
        &json!({"alg": "RS256", "kid": "k", "crit": ["b64"], "b64": false}),
        &claims(),
    );
    assert_eq!(check(&critical, &set), Err(Rejected::Malformed));
}

#[test]
fn times_issuer_and_audience_are_checked_with_a_minute_of_leeway() {
    let signer = Signer::ed();
    let set = keys(&[signer.jwk("k")]);
    let says = |claims: &Value| check(&signer.token(&json!({"alg": "EdDSA", "kid": "k"}), claims), &set);
    assert!(says(&with("exp", json!(NOW - 59))).is_ok());
    assert_eq!(says(&with("exp", json!(NOW - 60))), Err(Rejected::Expired));
    assert_eq!(
        says(&with("exp", Value::Null)),
        Err(Rejected::Expired),
        "a token without an end has ended"
    );
    assert_eq!(says(&with("exp", json!("2099"))), Err(Rejected::Expired));
    assert_eq!(says(&with("exp", json!(-1))), Err(Rejected::Expired));
    assert!(says(&with("exp", json!(NOW as f64 + 0.5))).is_ok());
    assert!(says(&with("exp", json!(u64::MAX))).is_ok());
    assert!(says(&with("nbf", json!(NOW + 60))).is_ok());
    assert_eq!(says(&with("nbf", json!(NOW + 61))), Err(Rejected::NotYetValid));
    assert_eq!(says(&with("nbf", json!("soon"))), Err(Rejected::Malformed));
    assert_eq!(
        says(&with("iss", json!("https://issuer.example/"))),
        Err(Rejected::Issuer)
    );
    assert_eq!(says(&with("aud", json!("shop2"))), Err(Rejected::Audience));
    assert_eq!(says(&with("aud", Value::Null)), Err(Rejected::Audience));
    assert!(says(&with("aud", json!("shop"))).is_ok());
}

#[test]
fn what_is_no_token_is_none() {
    let signer = Signer::ed();
    let set = keys(&[signer.jwk("k")]);
    let good = signer.good("k");
    for bad in [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "e30.e30.",
        &format!("{good}="),
        &format!("{good}.x"),
        &good[1..],
    ] {
        assert!(check(bad, &set).is_err(), "{bad}");
    }
    assert_eq!(check(&"a".repeat(16 * 1024 + 1), &set), Err(Rejected::TooLong));
    assert_ne!(fingerprint(&good), fingerprint(&good[1..]));
}

#[test]
fn sets_leave_out_what_cannot_be_used() {
    let (weak, other) = (
        json!({"kty": "RSA", "n": text([0xc1; 128]), "e": "AQAB"}),
        json!({"kty": "oct", "k": "AAAA"}),
    );
    let curve = json!({"kty": "EC", "crv": "P-384", "x": text([1; 48]), "y": text([1; 48])});
    let sealing = {
        let mut jwk = Signer::p256().jwk("e");
        jwk["use"] = json!("enc");
        jwk
    };
    let set = |keys: &[&Value]| KeySet::parse(json!({"keys": keys}).to_string().as_bytes());
    assert!(set(&[&weak, &other, &curve, &sealing]).is_err());
    let good = Signer::ed().jwk("k");
    assert!(set(&[&weak, &other, &curve, &sealing, &good]).is_ok());
    for bad in ["", "[]", "{}", r#"{"keys": {}}"#, r#"{"keys": []}"#] {
        assert!(KeySet::parse(bad.as_bytes()).is_err(), "{bad}");
    }
    assert!(KeySet::parse(&[b' '; 70_000]).is_err());
    assert!(set(&[&good; 65]).is_err());
}
